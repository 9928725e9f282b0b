"""The search for the best compression profile under an exact budget."""
