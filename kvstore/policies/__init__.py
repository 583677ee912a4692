"""Eviction policies: which object of a tier goes next. Pure classes; node and `kvstore bench trace` run the same."""
