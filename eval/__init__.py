"""Evaluation of trained policies. The judge, its statistics and the report live here."""
