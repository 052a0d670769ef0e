from nanovllm.inputs import TextPrompt, TokensPrompt

PromptType = str | list[int] | TextPrompt | TokensPrompt

__all__ = ["PromptType", "TextPrompt", "TokensPrompt"]
