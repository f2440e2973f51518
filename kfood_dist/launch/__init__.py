"""Starts ranks, and keeps watch over them."""
