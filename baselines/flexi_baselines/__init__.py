"""flexi-baselines: the pruning methods of other papers, as plugins of flexi_plugins."""
