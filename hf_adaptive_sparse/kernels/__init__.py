"""Native code for what torch does slowly, each kernel beside a readable reference in torch."""
