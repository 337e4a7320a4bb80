"""What a sampler's pictures are worth: prompts, a detector to mark the pictures, and the figures that follow."""
