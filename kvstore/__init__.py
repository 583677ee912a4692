"""The node of a KV-cache store for LLM inference: index, tiers, engine, gRPC service and command line."""

from importlib.metadata import version

__version__ = version("llm-kvstore")
__all__ = ["__version__"]
