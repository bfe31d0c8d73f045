"""Pure maths: tensors in, tensors out. What a method makes of a group of answers, and where the formula stands.

group   what all share: hits, common prefixes, rewards relative to the group
srpo    GREAM: prefix reward, advantage with a bonus for pass@k
recast  ReCast: repair of groups without a hit, contrast at the boundary
exact   the expectation that all of them estimate, in closed form
curves  every method as a weight over the target's probability
"""
