"""The SD3.5-Flash recipe (arXiv 2509.21318): a many-step teacher distilled into a student of four, two or one steps.

    flow.py                   the rectified flow's vocabulary and the student's rollout
    trajectory.py             stage (a): trajectory guidance
    distribution_matching.py  stage (b): distribution matching with timestep sharing, and the proxy
    adversarial.py            stage (b): heads on the proxy's features, hinge losses
    split_timestep.py         stage (c): two branches, exponential averages, interpolation
    text_dropout.py           text-encoder dropout

Networks are passed in as functions, so the same code distils a toy and the MMDiT.
"""
