"""The teacher's trajectories: rollouts, the pool that points are drawn from, precision and solver."""
