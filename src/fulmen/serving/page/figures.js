// Tokens, money and attention: of a turn, of a question about documents, and of all of them.

const MONEY_PLACES = 12;
const KINDS = ["hit", "miss", "output"];
const fixed = new Intl.NumberFormat("en", {
  useGrouping: false,
  minimumFractionDigits: MONEY_PLACES,
  maximumFractionDigits: MONEY_PLACES,
});
export const count = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

// A decimal string as an integer, so that a sum of money is right to the last digit.
const toUnits = (decimal) => BigInt(fixed.format(decimal).replace(".", ""));
const fromUnits = (units) => `${units}e-${MONEY_PLACES}`;

export const newTotals = () => ({
  ...{ hit: 0, miss: 0, output: 0, read: 0, inContext: 0, cost: 0n, dense: 0n },
  ...{ compared: true, uncounted: 0, contextUsed: 0 },
});

function money(decimal, currency) {
  const known = /^[A-Z]{3}$/.test(currency);
  const style = known ? { style: "currency", currency, currencyDisplay: "narrowSymbol" } : {};
  const digits = { minimumFractionDigits: 2, maximumFractionDigits: MONEY_PLACES };
  const text = new Intl.NumberFormat("en", { ...style, ...digits }).format(decimal);
  return known ? text : `${text} ${currency}`;
}

function percent(part, whole) {
  const share = (100 * part) / whole;
  return `${new Intl.NumberFormat("en", { maximumSignificantDigits: share < 99.5 ? 2 : 3 }).format(share)} %`;
}

function comparison(cost, dense) {
  if (!(dense > 0)) return "";
  return cost <= dense ? `${percent(dense - cost, dense)} less` : `${percent(cost - dense, dense)} more`;
}

function size(bytes) {
  const power = Math.min(4, Math.floor(Math.log10(bytes) / 3));
  return `${(bytes / 1000 ** power).toPrecision(3)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

function figuresOf(usage) {
  const {
    cost,
    dense_cost: dense,
    context_tokens: inContext,
    tokens_read: read,
    bytes_saved: saved,
  } = usage.fulmen;
  const { prompt_cache_hit_tokens: hit, prompt_cache_miss_tokens: miss, completion_tokens: output } = usage;
  return { hit, miss, output, cost, dense, inContext, read, saved };
}

/** Each part of the bars inside `parent` as long as its number. */
function drawBars(parent, parts) {
  for (const [name, length] of Object.entries(parts)) {
    parent.querySelector(`.bar .${name}`).style.flexGrow = Math.max(0, length);
  }
}

const fieldsOf = (receipt) => (name, text) =>
  (receipt.querySelector(`[data-field="${name}"]`).textContent = text);

function showTokensAndCost(receipt, { hit, miss, output, cost, dense }, info) {
  const show = fieldsOf(receipt);
  for (const [name, number] of Object.entries({ hit, miss, output })) show(name, count.format(number));
  show("cost", money(cost, info.currency));
  show("dense", dense === null ? "" : `dense ${money(dense, info.currency)}`);
  show("saving", comparison(Number(cost), Number(dense)));
  const ofDense = dense > 0 ? cost / dense : 1;
  drawBars(receipt, { hit, miss, output, cost: ofDense, cheaper: 1 - ofDense });
  receipt.hidden = false;
}

/** Show a turn's usage in its receipt. */
export function showReceipt(receipt, usage, info) {
  const figures = figuresOf(usage);
  const { read, inContext, saved } = figures;
  const show = fieldsOf(receipt);
  showTokensAndCost(receipt, figures, info);
  show("read", count.format(read));
  show("inContext", count.format(inContext));
  show("share", percent(read, inContext || 1));
  show("saved", saved > 0 ? `${size(saved)} of cache not read` : "");
  drawBars(receipt, { read, unread: inContext - read });
  receipt.querySelector(".attention").hidden = !info.dsa;
}

/** Of a question's bill, which has no cost before the first request. */
function figuresOfBill({ usage, cost }) {
  const { prompt_cache_hit_tokens: hit, prompt_cache_miss_tokens: miss, completion_tokens: output } = usage;
  return { hit, miss, output, cost: cost.amount ?? "0", dense: cost.amount ? cost.dense_amount : "0" };
}

/** Show a question's bill so far in its receipt. */
export function showBill(receipt, bill, info) {
  const { amount, currency } = bill.cost.deepseek_list;
  const { requests } = bill.usage;
  showTokensAndCost(receipt, figuresOfBill(bill), info);
  fieldsOf(receipt)("listed", money(amount, currency));
  fieldsOf(receipt)("requests", requests === 1 ? "1 request" : `${count.format(requests)} requests`);
}

/** Add a turn's usage to the conversation's totals; an answer that was cut short has none. */
export function addToTotals(totals, usage) {
  if (!usage) {
    totals.uncounted += 1;
    return;
  }
  const figures = figuresOf(usage);
  for (const name of ["read", "inContext"]) totals[name] += figures[name];
  addFigures(totals, figures);
  totals.contextUsed = figures.hit + figures.miss + figures.output;
}

/** Add a question's bill to the totals of all questions. */
export const addBill = (totals, bill) => addFigures(totals, figuresOfBill(bill));

function addFigures(totals, figures) {
  for (const name of KINDS) totals[name] += figures[name];
  totals.cost += toUnits(figures.cost);
  totals.compared &&= figures.dense !== null;
  if (totals.compared) totals.dense += toUnits(figures.dense);
  return totals;
}

/** Show the totals in `panel`, the sum also in `badge`. */
export function showTotals(panel, badge, totals, info) {
  const part = (name) => panel.querySelector(`[data-total="${name}"]`);
  const show = (name, text) => (part(name).textContent = text);
  const { hit, miss, output, cost, dense, compared, read, inContext, uncounted } = totals;
  for (const kind of KINDS) show(kind, count.format(totals[kind]));
  const sum = money(fromUnits(cost), info.currency);
  show("cost", sum);
  badge.textContent = cost > 0n ? sum : "Cost";
  const shown = compared && dense > 0n;
  show("dense", shown ? `dense ${money(fromUnits(dense), info.currency)},` : "");
  show("saving", shown ? comparison(Number(cost), Number(dense)) : "");
  drawBars(panel, { hit, miss, output, read, unread: inContext - read });
  part("attention").hidden = !(info.dsa && inContext > 0);
  show("share", percent(read, inContext || 1));
  show("uncounted", uncounted ? `Cut short and not counted: ${uncounted}` : "");
}

/** Show what a million tokens cost; without dense prices their column goes. */
export function showPrices(panel, info) {
  for (const kind of KINDS) {
    panel.querySelector(`[data-price="${kind}"]`).textContent = money(info.prices[kind], info.currency);
    const dense = info.dense_prices ? money(info.dense_prices[kind], info.currency) : "";
    panel.querySelector(`[data-dense-price="${kind}"]`).textContent = dense;
  }
  panel.querySelector("table").classList.toggle("no-dense", !info.dense_prices);
}

/** Show how much of the model's context the conversation fills. */
export function showContext(meter, used, context) {
  meter.querySelector("[data-field='context']").textContent =
    `${count.format(used)} of ${count.format(context)} tokens`;
  meter.querySelector(".bar i").style.width = `${Math.min(100, (100 * used) / context)}%`;
  meter.classList.toggle("nearly-full", used > 0.9 * context);
}
