"""How `fallow.sparsity.shrink` finds what can go: follow labels, decide, cut, prove."""
