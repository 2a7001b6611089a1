"""Inside other people's harnesses: our metrics in torch-pruning, our folders in lm-eval, LLM-Pruner's checkpoints in ours."""
