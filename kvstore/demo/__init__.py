"""`kvstore demo`: prefill in one process, decode in another, a real model, a real node, one kill -9."""
