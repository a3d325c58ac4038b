"""Model weights: where they come from (hub, made, random), how they are sharded, kept and found again."""
