"""A reward function for tests of ppo.py."""


def words(prompts, responses, rows):
    """The words of a response; those of the prompt's better answer have to be more than none."""
    assert all(row['chosen'] and row['prompt'] == prompt for prompt, row in zip(prompts, rows, strict=True))
    return [len(response.split()) for response in responses]
