# GRPO, arXiv:2402.03300, of SmolLM2-135M-Instruct on UltraFeedback's prompts with the reward model of reward_smollm2.py, on one
# consumer GPU of 8 to 24 GB, or a patient CPU (--dtype=float32 --max_tokens=1024). No result is claimed.
#     python ppo.py config/grpo_smollm2.py
model = 'HuggingFaceTB/SmolLM2-135M-Instruct'  # or the folder that make real leaves: out/real/SmolLM2-135M-Instruct
reward_model = 'out/reward_smollm2/model'
data = 'ultrafeedback'
chat = True
dtype = 'bfloat16'
loss = 'grpo'
group_size, batch_size, minibatch_size = 8, 128, 64  # a round: 8 answers to each of 16 prompts; two optimizer steps
ppo_epochs = 1
kl_coef = 0.04  # the paper's
max_prompt_length = 512
max_new_tokens = 256
missing_eos_penalty = 1.0  # or it learns to go on until it is cut
sample_batch = 64  # answers side by side
max_tokens = 2048  # leaves room on 8 GB
lr = 2e-6
n_examples = 16384
out_dir = 'out/grpo_smollm2'
