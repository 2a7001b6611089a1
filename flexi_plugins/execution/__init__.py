"""The engine: one sweep runs any number of plans over the same tokens, each distinct block once, each weight read once.

requests -> packing (tries of tokens, in batches) -> likelihoods (what the journal knows is not run) -> sweep -> answers
plans    -> schedule (the trie of blocks, its order, what is read when) -> layout (what stays in memory, which batches
            run together) -> sweep: states (hidden states, in memory or spilled) through blocks (built from what was
            read, run as transformers runs them; branches: every sequence of a trie attends alone) -> readout
            (log-probabilities where plans end)
samples  -> backward (the same blocks in reverse, with gradients)
"""
