"""What a step of distillation costs: in time, memory, arithmetic and kernels. See README.md here."""
