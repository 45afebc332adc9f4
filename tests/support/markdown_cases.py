"""Cases for the pages' Markdown: examples, hostile and long texts, code that runs in the page."""

EXAMPLES = {
    "# One\n### Three #\n#none": '<h3 class="level1">One</h3><h5 '
    'class="level3">Three</h5><p>#none</p>',
    "a **b *c* d** _e_ ~~f~~ ***g***": "<p>a <strong>b <em>c</em> d</strong> <em>e</em> "
    "<del>f</del> <strong><em>g</em></strong></p>",
    "snake_case_name 2 * 3 * 4 **open": "<p>snake_case_name 2 * 3 * 4 **open</p>",
    "\\*no\\* `` a ` b `` **`**kw`**": "<p>*no* <code>a ` b</code> "
    "<strong><code>**kw</code></strong></p>",
    "- a\n- b\n  - c\n\n  d\n1. e": "<ul><li><p>a</p></li><li><p>b</p><ul>"
    "<li><p>c</p></li></ul><p>d</p></li></ul><ol "
    'start="1"><li><p>e</p></li></ol>',
    "2) x\n   ```py\n   y\n   ```\n3) z": '<ol start="2"><li><p>x</p><figure '
    'class="code"><figcaption><span>py</span><button '
    'type="button">Copy</button></figcaption><pre '
    'tabindex="0"><code>y\n'
    "</code></pre></figure></li><li><p>z</p></li></ol>",
    "Born in\n1990. It": "<p>Born in\n1990. It</p>",
    "> a\n> > b\n\n---": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><hr>",
    "|a|b|\n|-|:-:|\n|`x\\|y`|**z**|": '<div class="scroll" '
    'tabindex="0"><table><thead><tr><th>a</th><th '
    'style="text-align: '
    'center;">b</th></tr></thead><tbody><tr><td><code>x|y</code></td><td '
    'style="text-align: '
    'center;"><strong>z</strong></td></tr></tbody></table></div>',
    "a | b\n--- | no": "<p>a | b\n--- | no</p>",
    "![i](//x.org/i.png) [j](java\tscript:1)": "<p>![i](//x.org/i.png) [j](java    script:1)</p>",
    "<b>&lt;\x00": "<p>&lt;b&gt;&amp;lt;�</p>",
    "[**a** b](http://x.org/a_(b)_c)": '<p><a href="http://x.org/a_(b)_c" target="_blank" '
    'rel="noopener noreferrer" '
    'title="http://x.org/a_(b)_c"><strong>a</strong> '
    "b</a></p>",
    "(https://x.org/a_b).": '<p>(<a href="https://x.org/a_b" target="_blank" rel="noopener '
    'noreferrer" '
    'title="https://x.org/a_b">https://x.org/a_b</a>).</p>',
    "![i](https://x.org/i.png)": '<p><a href="https://x.org/i.png" target="_blank" '
    'rel="noopener noreferrer" '
    'title="https://x.org/i.png">i</a></p>',
}
# repeated to the length of the longest answers; quadratic for a careless parser
LONG = (
    "*a ",
    "**a",
    "[",
    "[a](",
    "`a ",
    "a`a` ",
    "> ",
    "- ",
    "1. ",
    "|",
    "_a ",
    "\\*",
    "<http://",
    "```\n",
    "https://x.org/)",
    "| a | b |\n",
    "|-",
    "***",
    "~~a ~~ ",
    "  - a\n",
    "#",
    "\n> - ",
)
# these may become neither an element that runs nor a link other than to http, https, mailto
HOSTILE = [
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html,alert(1))",
    "[x](vbscript:alert(1))",
    "[x](\x01javascript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](//x.org/alert(1))",
    "[x](/v1/modelsalert(1))",
    "<javascript:alert(1)>",
    '[x](https://x.org" onclick="alert(1))',
    "![x](javascript:alert(1))",
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>',
]
AROUND = (
    "TEXT",
    "**TEXT**",
    "> - TEXT",
    "|TEXT|\n|-|\n|TEXT|",
    "# TEXT",
    "`TEXT`",
    "```TEXT\nTEXT",
)
# code that runs in the page, where window.markdown is the module
AS_HTML = """(text) => {
    const node = document.createElement("div");
    markdown.show(node, text);
    return node.innerHTML;
}"""
SHOWN = """(texts) => { for (const text of texts) {
    const node = document.createElement("div");
    markdown.show(node, text);
    if (text.length < 1000) document.getElementById("log").append(node);
} }"""
# stream a text: report prefixes that render differently from the start, or replace the first block
GROWN = """(text) => {
    const node = document.createElement("div"), wrong = [];
    let first = null;
    for (let i = 1; i <= text.length; i++) {
        markdown.show(node, text.slice(0, i));
        const fresh = document.createElement("div");
        markdown.show(fresh, text.slice(0, i));
        if (node.innerHTML !== fresh.innerHTML) wrong.push(text.slice(0, i));
        if (i > 20 && node.firstChild !== (first ??= node.firstChild)) wrong.push(i);
    }
    return wrong;
}"""
HARMLESS = """() => [...document.querySelectorAll("#log *")].filter((e) =>
    e.matches("img, script, style, iframe, object, form") || [...e.attributes].some((a) =>
    a.name.startsWith("on") || (a.name === "href" && !/^(https?|mailto):/.test(a.value))))
  .map((e) => e.outerHTML)"""
