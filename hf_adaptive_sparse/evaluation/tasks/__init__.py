"""The paper's benchmarks, each with its official scoring, behind one interface."""
