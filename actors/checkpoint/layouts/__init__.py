"""How routed experts are stored: one module per layout of the hub, all with the same two doors.

`expected(config)` lists a layout's tensors, `expert_pieces(...)` says which bytes of them make one expert. Which layout
a checkpoint has is decided by what its index holds, and checked against what its config announces.
"""
