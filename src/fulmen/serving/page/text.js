// A model's answer as elements: prose with its line breaks, fenced code in boxes. Text is only set as text.

/** Draw the answer into `parent`. Blocks that did not change are left alone: a selection in them lasts. */
export function drawText(parent, text) {
  const blocks = blocksOf(text);
  blocks.forEach((block, i) => {
    const node = nodeFor(block, parent, parent.children[i]);
    if (node.raw === block.text) return;
    node.raw = block.text;
    if (block.kind === "prose") node.replaceChildren(...inline(block.text));
    else {
      node.querySelector("code").textContent = block.text;
      node.querySelector(".language").textContent = block.language;
    }
  });
  while (parent.children.length > blocks.length) parent.lastElementChild.remove();
}

/** Copy what the button belongs to: a box of code, or a whole turn. */
export async function copy(button) {
  const text = button.closest(".code, .turn").raw;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "The browser does not allow it"; // without TLS, other than on localhost
  }
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

/** `code`, **bold** and # headings as elements, the rest as text. */
function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(/`([^`\n]+)`|\*\*([^*\n]+)\*\*|^#{1,6} +(.+)$/gm)) {
    const element = document.createElement(match[1] ? "code" : "strong");
    element.textContent = match[1] ?? match[2] ?? match[3];
    nodes.push(text.slice(end, match.index), element);
    end = match.index + match[0].length;
  }
  return [...nodes, text.slice(end)];
}

function nodeFor(block, parent, old) {
  if (old?.kind === block.kind) return old;
  const template = document.getElementById(`${block.kind}-template`);
  const node = template.content.firstElementChild.cloneNode(true);
  node.kind = block.kind;
  if (old) old.replaceWith(node);
  else parent.append(node);
  return node;
}

/** [{kind: "prose" | "code", language, text}]; after a fence all is code until the closing one comes. */
function blocksOf(text) {
  const blocks = [{ kind: "prose", lines: [] }];
  for (const line of text.split("\n")) {
    const current = blocks.at(-1);
    const [, fence, language] = line.match(/^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)/) ?? [];
    if (current.kind === "prose" && fence) blocks.push({ kind: "code", fence, language, lines: [] });
    else if (current.kind === "code" && fence?.startsWith(current.fence) && !language) {
      blocks.push({ kind: "prose", lines: [] });
    } else current.lines.push(line);
  }
  return blocks.map(finished).filter((block) => block.kind === "code" || block.text);
}

function finished({ kind, language, lines }) {
  const text = lines.join("\n");
  // Blank lines around a code box are its margins already.
  return { kind, language, text: kind === "code" ? text : text.replace(/^\s*\n/, "").trimEnd() };
}
