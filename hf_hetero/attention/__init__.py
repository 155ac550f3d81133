"""This folder computes attention across a group of ranks: context, kernels, exchanges, what transformers calls.

Letters in shapes, here and in `kernels`:

    T, t    tokens of the ranks that share heads (without blocks: the whole pack); tokens of this rank's samples
    n       tokens that the model computes on this rank: t, or the 1 that stands in where t is 0
    Tq, Tk  queries, and keys, of one call of a kernel
    H, Hk   heads of queries, and of keys and values, in whatever a function is given
    h, hk   those of them that this rank computes, where ranks share heads
    D, Dv   elements of a query's or key's head, and of a value's
    R       runs of queries in one call of a kernel
    d       degree: ranks of the group
"""
