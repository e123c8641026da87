"""What a run will cost: work, time, hardware, published budgets. Predicted."""
