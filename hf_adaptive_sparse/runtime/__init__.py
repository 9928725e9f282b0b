"""The sparse runtime: linears whose weight stays compressed in memory, and when they pay."""
