"""The codec in NumPy: slow, plain, and the definition. The C++ core must agree with it bit for bit."""
