"""The bulk path: objects over bare TCP and unix sockets, and places in shared memory, beside gRPC."""
