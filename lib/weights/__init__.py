"""Where models (and the hub's data) come from: hub, made, random; how weights are sharded, kept and found again."""
