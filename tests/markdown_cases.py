"""What the pages make of Markdown: examples, hostile texts, and long ones that a careless reader is slow on."""

EXAMPLES = {
    "# One\n### Three #\n#none": '<h3 class="level1">One</h3><h5 class="level3">Three</h5><p>#none</p>',
    "a **b *c* d** _e_ ~~f~~ ***g***": "<p>a <strong>b <em>c</em> d</strong> <em>e</em> <del>f</del>"
    " <strong><em>g</em></strong></p>",
    "snake_case_name 2 * 3 * 4 **open": "<p>snake_case_name 2 * 3 * 4 **open</p>",
    r"\*no\* `` a ` b `` **`**kw`**": "<p>*no* <code>a ` b</code> <strong><code>**kw</code></strong></p>",
    "- a\n- b\n  - c\n\n  d\n1. e": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul><p>d</p></li>"
    '</ul><ol start="1"><li><p>e</p></li></ol>',
    "2) x\n   ```py\n   y\n   ```\n3) z": '<ol start="2"><li><p>x</p><figure class="code"><figcaption><span>py</span>'
    '<button type="button">Copy</button></figcaption><pre tabindex="0"><code>y\n</code></pre></figure></li>'
    "<li><p>z</p></li></ol>",
    "Born in\n1990. It": "<p>Born in\n1990. It</p>",
    "> a\n> > b\n\n---": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><hr>",
    "|a|b|\n|-|:-:|\n|`x\\|y`|**z**|": '<div class="scroll" tabindex="0"><table><thead><tr><th>a</th>'
    '<th style="text-align: center;">b</th></tr></thead><tbody><tr><td><code>x|y</code></td>'
    '<td style="text-align: center;"><strong>z</strong></td></tr></tbody></table></div>',
    "a | b\n--- | no": "<p>a | b\n--- | no</p>",
    "![i](//x.org/i.png) [j](java\tscript:1)": "<p>![i](//x.org/i.png) [j](java    script:1)</p>",
    "<b>&lt;\0": "<p>&lt;b&gt;&amp;lt;\ufffd</p>",
}
LINK = '<a href="{0}" target="_blank" rel="noopener noreferrer" title="{0}">{1}</a>'
EXAMPLES |= {
    "[**a** b](http://x.org/a_(b)_c)": f"<p>{LINK.format('http://x.org/a_(b)_c', '<strong>a</strong> b')}</p>",
    "(https://x.org/a_b).": f"<p>({LINK.format('https://x.org/a_b', 'https://x.org/a_b')}).</p>",
    "![i](https://x.org/i.png)": f"<p>{LINK.format('https://x.org/i.png', 'i')}</p>",
}
# each as long as a long answer, and quadratic for a careless reader
LONG = (
    "*a ",
    "**a",
    "[",
    "[a](",
    "`a ",
    "a`" * 2 + " ",
    "> ",
    "- ",
    "1. ",
    "|",
    "_a ",
    "\\*",
    "<http://",
    "```\n",
)
LONG += ("https://x.org/)", "| a | b |\n", "|-", "***", "~~a ~~ ", "  - a\n", "#", "\n> - ")
# that nothing may come of: neither an element that runs nor a link to anything but http, https, mailto
TARGETS = (
    "javascript:",
    "JaVaScRiPt:",
    "data:text/html,",
    "vbscript:",
    "\x01javascript:",
    "&#106;avascript:",
    "//x.org/",
    "/v1/models",
)
HOSTILE = [f"[x]({target}alert(1))" for target in TARGETS]
HOSTILE += [
    "<javascript:alert(1)>",
    '[x](https://x.org" onclick="alert(1))',
    "![x](javascript:alert(1))",
]
HOSTILE += ['<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>']
AROUND = (
    "TEXT",
    "**TEXT**",
    "> - TEXT",
    "|TEXT|\n|-|\n|TEXT|",
    "# TEXT",
    "`TEXT`",
    "```TEXT\nTEXT",
)
