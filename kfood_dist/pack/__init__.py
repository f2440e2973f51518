"""Packs pictures into shards. The entry point is `pack.py`. Nothing here needs torch."""
