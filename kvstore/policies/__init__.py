"""Eviction policies: which object of a tier goes next. Pure classes, run by the live node and by `kvstore bench trace`."""
