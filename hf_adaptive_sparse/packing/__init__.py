"""Storage formats as pure functions on tensors: packed bit codes and bitmask-sparse weights."""
