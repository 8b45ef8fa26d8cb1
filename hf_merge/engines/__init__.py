"""HOW a merge runs: the plan made from headers, the streaming engine, the sinks that results go to."""
