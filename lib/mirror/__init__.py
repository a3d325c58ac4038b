"""W&B as a mirror of the records: what it is sent, by whom, and how studies are read back."""
