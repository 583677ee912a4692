"""Bridges to inference engines. Each module needs its engine installed; nothing imports them but their users."""
