"""Training objectives: pure functions of a network u(x, t, s, cond), one file each."""
