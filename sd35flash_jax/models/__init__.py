"""What the papers describe: parameters and their arithmetic, free of files, prompts and devices.

Modules compute in the dtype of their own parameters; norms, softmax and sinusoids are taken in float32.
"""
