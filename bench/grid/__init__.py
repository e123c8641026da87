"""The grid: every few-step objective from every start, at equal student images and at equal network forwards."""
