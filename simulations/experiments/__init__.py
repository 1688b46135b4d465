"""The papers' comparisons as data: a TOML file each, and the machine that runs and judges them."""
