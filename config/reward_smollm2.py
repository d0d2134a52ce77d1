# A reward model from SmolLM2-135M-Instruct on UltraFeedback, on one consumer GPU of 8 to 24 GB, or a patient CPU (with
# --dtype=float32 --max_tokens=1024). grpo_smollm2.py takes it. Not a paper's experiment; no result is claimed.
#     python reward.py config/reward_smollm2.py
model = 'HuggingFaceTB/SmolLM2-135M-Instruct'  # or the folder that make real leaves: out/real/SmolLM2-135M-Instruct
data = 'ultrafeedback'
chat = True
dtype = 'bfloat16'
center_coef = 0.01  # keeps scores near 0, so that those of several prompts can be compared
batch_size = 32
max_length = 1024
max_prompt_length = 512
max_tokens = 2048  # leaves room on 8 GB
lr = 2e-5
lr_schedule = 'cosine'
warmup_steps = 50
eval_every = 9984
out_dir = 'out/reward_smollm2'
