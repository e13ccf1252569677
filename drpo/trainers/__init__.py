"""The training loops: online (PPO and DR-PO) and offline (SFT, reward models, preference losses)."""
