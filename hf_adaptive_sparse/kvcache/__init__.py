"""The adaptive KV cache: codecs, layers, and the ``QuantizedCache`` subclass built from them."""
