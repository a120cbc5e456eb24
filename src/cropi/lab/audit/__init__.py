"""Is the estimate right, and does it predict improvement? Answers from fresh trajectories, with error bars."""
