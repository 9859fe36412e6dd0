"""DeepSpeed: its JSON configuration, ZeRO stages 0 to 3, AutoTP and offload, behind the engine protocol."""
