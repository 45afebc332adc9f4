"""Fields of other servers (vLLM, SGLang, llama.cpp, Ollama) and of OpenAI's API that this server
lacks: the values that change nothing, and what to use instead. ``null`` is the same as no field."""

from typing import Any

# field -> the value that changes nothing, and why another one is refused
NEUTRAL: dict[str, tuple[Any, str]] = {
    "bad_words": ([], "logit_bias of -100 excludes tokens"),
    "continue_final_message": (False, "/v1/completions continues a text"),
    "documents": ([], "messages have all that the model reads"),
    "early_stopping": (False, "there is no beam search"),
    "include_reasoning": (True, "reasoning stays in content"),
    "include_stop_str_in_output": (False, "an answer ends before its stop text"),
    "length_penalty": (1, "there is no beam search"),
    "mirostat": (0, "there is no such sampler"),
    "priority": (0, "the queues of clients take turns"),
    "return_token_ids": (False, "/tokenize returns token ids"),
    "return_tokens_as_token_ids": (False, "/tokenize returns token ids"),
    "separate_reasoning": (False, "reasoning stays in content"),
    "skip_special_tokens": (True, "special tokens are no text"),
    "spaces_between_special_tokens": (True, "special tokens are no text"),
    "typical_p": (1, "there is no such sampler"),
    "use_beam_search": (False, "there is no beam search"),
}
# field -> the fields that replace it; the first one that the request has counts
RENAMED = {
    "ebnf": "structured_outputs.grammar",
    "enable_thinking": "chat_template_kwargs.enable_thinking",
    "format": "response_format text.format",
    "function_call": "tool_choice",
    "functions": "tools",
    "grammar": "structured_outputs.grammar",
    "guided_choice": "structured_outputs.choice",
    "guided_grammar": "structured_outputs.grammar",
    "guided_json": "structured_outputs.json text.format",
    "guided_regex": "structured_outputs.regex",
    "input": "messages prompt",
    "instructions": "messages prompt",
    "json_schema": "response_format.json_schema structured_outputs.json text.format",
    "lora": "model",
    "max_completion_tokens": "max_tokens max_output_tokens",
    "max_length": "max_tokens max_output_tokens",
    "max_new_tokens": "max_tokens max_output_tokens",
    "max_output_tokens": "max_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input prompt",
    "min_length": "min_tokens",
    "min_new_tokens": "min_tokens",
    "n_predict": "max_tokens max_output_tokens",
    "n_probs": "top_logprobs logprobs",
    "num_predict": "max_tokens max_output_tokens",
    "num_return_sequences": "n",
    "prompt": "messages input",
    "reasoning": "reasoning_effort",
    "reasoning_effort": "reasoning.effort",
    "regex": "structured_outputs.regex",
    "response_format": "structured_outputs text.format",
    "stop_sequences": "stop",
    "stop_words": "stop",
    "system": "messages instructions prompt",
    "thinking": "chat_template_kwargs.enable_thinking",
    "verbosity": "text.verbosity",
}
# field -> why there is nothing like it, or what does a similar thing
UNSUPPORTED = {
    "allowed_token_ids": "structured_outputs and logit_bias limit the tokens of an answer",
    "audio": "it reads and writes text",
    "chat_template": "its option --chat-template sets the template",
    "context_management": "a prompt that is too long is refused",
    "extra": "put its fields into the body",
    "extra_body": "put its fields into the body",
    "moderation": "it has no filter",
    "num_ctx": "its option --max-model-len sets the length of the context",
    "prompt_logprobs": "echo with logprobs in /v1/completions returns them",
    "provider": "it forwards no requests",
    "samplers": "their order is fixed",
    "suffix": "it continues a text at its end",
    "truncate_prompt_tokens": "a prompt that is too long is refused; /tokenize counts its tokens",
    "web_search_options": "it fetches nothing",
}


def refusal(name: str, fields: Any) -> str | None:
    """Return the message about a field of the tables that a request with ``fields`` does not have;
    None: they have nothing about it."""
    if name in UNSUPPORTED:
        return f"not supported by this server: {UNSUPPORTED[name]}"
    for replacement in RENAMED.get(name, "").split():
        if replacement.partition(".")[0] in fields:
            return f"not supported by this server; it has {replacement!r} instead"
    return None
