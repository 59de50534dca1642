"""Answers of models, with the content and the calls (name, arguments) that are in them."""

Case = tuple[str, str, list[tuple[str, str]]]

CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
OTHER = '{"name": "time", "arguments": {}}'

HERMES: dict[str, Case] = {
    "one call": (f"<tool_call>\n{CALL}\n</tool_call>", "", [("weather", '{"city": "Oslo"}')]),
    "no white space": (f"<tool_call>{CALL}</tool_call>", "", [("weather", '{"city": "Oslo"}')]),
    "several": (
        f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{OTHER}\n</tool_call>",
        "",
        [("weather", '{"city": "Oslo"}'), ("time", "{}")],
    ),
    "text around": (
        f"Let me see.\n<tool_call>{CALL}</tool_call> and <tool_call>{OTHER}</tool_call>\n\nDone.\n",
        "Let me see.\n and \n\nDone.\n",
        [("weather", '{"city": "Oslo"}'), ("time", "{}")],
    ),
    "white space alone is no content": (f"\n\n<tool_call>{CALL}</tool_call>\n ", "", [("weather", '{"city": "Oslo"}')]),
    "arguments before the name": (
        '<tool_call>{"arguments": {"b": [1, {"c": -2.5e+3}]}, "name": "f"}</tool_call>',
        "",
        [("f", '{"b": [1, {"c": -2.5e+3}]}')],
    ),
    "other members": (
        '<tool_call>{"id": 7, "x": [{"name": "no"}, null], "name": "f", "y": "}", "arguments": {"a": 1}, "z": true}'
        "</tool_call>",
        "",
        [("f", '{"a": 1}')],
    ),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    "Llama's word": ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", [("f", '{"a": 1}')]),
    "arguments keep their white space, key order and repeated keys": (
        '<tool_call>{ "name" :\t"f",\n"arguments":\n{ "b" : 1,\r\n  "a":[ ],"b":2 }\n}\n</tool_call>',
        "",
        [("f", '{ "b" : 1,\r\n  "a":[ ],"b":2 }')],
    ),
    "brackets, quotes and markers in strings": (
        r'<tool_call>{"name": "f", "arguments": {"a": "}]{[\"</tool_call><tool_call>", "b\\": "\\"}}</tool_call>',
        "",
        [("f", r'{"a": "}]{[\"</tool_call><tool_call>", "b\\": "\\"}')],
    ),
    "escapes stay as they were written": (
        r'<tool_call>{"name": "f", "arguments": {"a": "\ud83d\ude00\u00e9\n😀é\/"}}</tool_call>',
        "",
        [("f", r'{"a": "\ud83d\ude00\u00e9\n😀é\/"}')],
    ),
    "escapes in names": (r'<tool_call>{"n\u0061me": "f\u005fg", "arguments": {}}</tool_call>', "", [("f_g", "{}")]),
    "the first of two names, the first arguments": (
        '<tool_call>{"name": "f", "name": "g", "arguments": {"a": 1}, "arguments": {"a": 2}}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "no closing marker": (f"<tool_call>{CALL}", "", [("weather", '{"city": "Oslo"}')]),
    "a brace too few": (f"<tool_call>{CALL[:-1]}\n</tool_call>ok", "ok", [("weather", '{"city": "Oslo"}')]),
    "a brace too many": (f"<tool_call>{CALL}}}\n</tool_call>", "}\n</tool_call>", [("weather", '{"city": "Oslo"}')]),
    "arguments that are no JSON come as they are": (
        '<tool_call>{"name": "f", "arguments": {\'a\': True, b: [1,], }}</tool_call>',
        "",
        [("f", "{'a': True, b: [1,], }")],
    ),
    "cut off in the arguments": ('<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    "cut off in the name": ('Hi <tool_call>{"name": "f', 'Hi <tool_call>{"name": "f', []),
    "cut off before the arguments": ('<tool_call>{"name": "f", "ar', '<tool_call>{"name": "f", "ar', []),
    "cut off between arguments and name": (
        '<tool_call>{"arguments": {"a": 1}, "na',
        '<tool_call>{"arguments": {"a": 1}, "na',
        [],
    ),
    "cut off in a marker": ("Hi <tool_ca", "Hi <tool_ca", []),
    "cut off in the closing marker": (f"<tool_call>{CALL}</tool", "</tool", [("weather", '{"city": "Oslo"}')]),
    "no JSON": ("<tool_call>weather(Oslo)</tool_call>", "<tool_call>weather(Oslo)</tool_call>", []),
    "a list": (f"<tool_call>[{CALL}]</tool_call>", f"<tool_call>[{CALL}]</tool_call>", []),
    "a name that is no text": (
        '<tool_call>{"name": 7, "arguments": {}}',
        '<tool_call>{"name": 7, "arguments": {}}',
        [],
    ),
    "half of a surrogate pair for a name": (
        r'<tool_call>{"name": "\ud83d", "arguments": {}}',
        r'<tool_call>{"name": "\ud83d", "arguments": {}}',
        [],
    ),
    "arguments that are no object": (
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        [],
    ),
    "a call behind one that is none": (
        f'<tool_call>{{"name" <tool_call>{OTHER}</tool_call>!',
        '<tool_call>{"name" !',
        [("time", "{}")],
    ),
    "looks like a marker": ("a <tool_cal> <<tool <tool_call >", "a <tool_cal> <<tool <tool_call >", []),
    "a marker behind half of one": (f"<tool_<tool_call>{OTHER}</tool_call>", "<tool_", [("time", "{}")]),
    "a call without a marker": (CALL, CALL, []),
    "nothing": ("", "", []),
    "white space": (" \n ", " \n ", []),
}

LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Oslo"}}'
LLAMA_OTHER = '{"name": "time", "parameters": {}}'

LLAMA: dict[str, Case] = {
    "one call": (LLAMA_CALL, "", [("weather", '{"city": "Oslo"}')]),
    "behind the marker": (f"<|python_tag|>{LLAMA_CALL}", "", [("weather", '{"city": "Oslo"}')]),
    "several": (f"{LLAMA_CALL}; {LLAMA_OTHER}", "", [("weather", '{"city": "Oslo"}'), ("time", "{}")]),
    "several, each with its marker": (
        f"<|python_tag|>{LLAMA_CALL};<|python_tag|>{LLAMA_OTHER}",
        "",
        [("weather", '{"city": "Oslo"}'), ("time", "{}")],
    ),
    "several without a separator": (
        f"\n{LLAMA_CALL}\n{LLAMA_OTHER}",
        "",
        [("weather", '{"city": "Oslo"}'), ("time", "{}")],
    ),
    "Hermes's word": (CALL, "", [("weather", '{"city": "Oslo"}')]),
    "text and a marked call": (f"I look. <|python_tag|>{LLAMA_OTHER}", "I look. ", [("time", "{}")]),
    "text and what would be a call": (f"I look. {LLAMA_OTHER}", f"I look. {LLAMA_OTHER}", []),
    "JSON that is no call": ('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    "JSON with only a name": ('{"name": "Bob"}', '{"name": "Bob"}', []),
    "code": ('<|python_tag|>brave_search.call(query="a")', 'brave_search.call(query="a")', []),
    "a call, then text": (f"{LLAMA_OTHER}; and so on", "; and so on", [("time", "{}")]),
    "a call, then JSON": (f'{LLAMA_OTHER}; {{"a": 1}}', '; {"a": 1}', [("time", "{}")]),
    "cut off": ('{"name": "f", "parameters": {"a": [1, 2', "", [("f", '{"a": [1, 2')]),
    "cut off in the name": ('{"name": "f', '{"name": "f', []),
    "cut off in the marker": ("<|python", "<|python", []),
    "cut off behind the separator": (f"{LLAMA_OTHER};", ";", [("time", "{}")]),
}

CASES = [
    (parser, text) for parser, cases in (("hermes", HERMES), ("llama3_json", LLAMA)) for text, *_ in cases.values()
]
