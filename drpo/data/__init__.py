"""From files and hub datasets to tokenised examples."""
