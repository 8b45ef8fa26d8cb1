def aligned_experts(group, init):
    raise NotImplementedError
