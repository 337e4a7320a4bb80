"""Speed and memory at true size with random weights, alone and beside other implementations; `run.benchmark` is the
way in. Each side is measured in a process of its own."""
