"""Ways for objects between a client and a node: a gRPC stream, a bare socket, the node's own memory."""
