"""Many runs: what is varied, who does which, and what they say together."""
