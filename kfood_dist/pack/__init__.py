"""From pictures to shards; `pack.py` is the way in. Nothing here needs torch."""
