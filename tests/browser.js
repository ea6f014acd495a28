// What a page shows, as seen from inside it; tests/browser.py loads this into every page that it opens.
window.checks = {
  async settle() {
    const images = [...document.images];
    images.forEach(image => { image.loading = 'eager'; });
    await Promise.all(images.map(image => image.decode().catch(() => null)));
    if (window.MathJax?.startup?.promise) await MathJax.startup.promise;
    await document.fonts.ready;
  },

  missingImages() {
    return [...document.images].filter(image => image.naturalWidth === 0).map(image => image.src.slice(0, 200));
  },

  imagesWithoutWords() {
    const images = [...document.querySelectorAll('main img')];
    return images.filter(image => !image.alt.trim()).map(image => image.src.slice(-80));
  },

  unsetMathematics() {
    const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const verbatim = 'pre, code, script, style, noscript, textarea, mjx-assistive-mml, annotation';
    while (walker.nextNode()) {
      const text = walker.currentNode.data.trim();
      if (walker.currentNode.parentElement.closest(verbatim)) continue;
      if (/\$\$|\\\(|\\\[|\\begin\{|\\frac/.test(text)) found.push(`raw: ${text.slice(0, 80)}`);
    }
    for (const place of document.querySelectorAll('.math')) {
      if (!place.querySelector('mjx-container, math')) found.push(`not set: ${place.textContent.trim().slice(0, 80)}`);
    }
    for (const wrong of document.querySelectorAll('[data-mjx-error], merror')) {
      found.push(`error: ${(wrong.getAttribute('data-mjx-error') || wrong.textContent).slice(0, 80)}`);
    }
    for (const font of document.fonts) if (font.status === 'error') found.push(`font: ${font.family}`);
    return found;
  },

  formulas() {
    return document.querySelectorAll('mjx-container, math').length;
  },

  formulaFonts() {
    return [...document.fonts].filter(font => /^MJX/.test(font.family) && font.status === 'loaded').length;
  },

  tooWide() {
    const room = window.innerWidth, width = document.documentElement.scrollWidth;
    if (width <= room) return [];
    const isBoxed = element => {
      const above = element.parentElement;
      return above && above !== document.body && (getComputedStyle(above).overflowX !== 'visible' || isBoxed(above));
    };
    const wide = [...document.body.querySelectorAll('*')]
      .filter(element => element.getBoundingClientRect().right > room + 1 && !isBoxed(element))
      .map(element => `${element.tagName} ${element.className}`.slice(0, 60));
    return [`${width} wide in a window of ${room}: ${wide.slice(0, 4).join(', ')}`];
  },

  // Contrast of each piece of text to the background behind it, as WCAG 2.2 defines it.
  contrasts() {
    const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
    const rgba = colour => {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
      return [red, green, blue, alpha / 255];
    };
    const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
    const behind = element => {
      const below = element.parentElement ? behind(element.parentElement) : [255, 255, 255];
      return over(rgba(getComputedStyle(element).backgroundColor), below);
    };
    const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const luminance = colour => {
      const [red, green, blue] = colour.map(value => linear(value / 255));
      return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    return [...document.querySelectorAll('main :is(p, li, td, th, dt, dd, figcaption, h1, h2, h3, a)')]
      .filter(element => element.textContent.trim() && element.getClientRects().length)
      .map(element => {
        const ground = behind(element), ink = over(rgba(getComputedStyle(element).color), ground);
        const [dark, light] = [luminance(ground), luminance(ink)].sort((a, b) => a - b);
        return { contrast: (light + 0.05) / (dark + 0.05), text: element.textContent.trim().slice(0, 50) };
      });
  },

  // 0 for black to 1 for white.
  brightness() {
    const colours = [document.body, document.documentElement].map(each => getComputedStyle(each).backgroundColor);
    const colour = colours.find(each => each !== 'rgba(0, 0, 0, 0)') ?? 'rgb(255, 255, 255)';
    const [red, green, blue] = colour.match(/[\d.]+/g).map(Number);
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255;
  },

  // Text of the elements that match, with the line breaks of what is drawn.
  words(selector) {
    const found = [...document.querySelectorAll(selector)];
    const lines = found.flatMap(each => [...each.querySelectorAll('tspan.line')]);
    return (lines.length ? lines : found).map(each => each.textContent).join('\n').trim();
  },

  // Numbers of a column from the top; null where a cell holds none.
  column(table, position) {
    return [...document.querySelectorAll(`${table} tbody tr`)]
      .filter(row => row.getClientRects().length && row.cells[position])
      .map(row => row.cells[position])
      .map(cell => parseFloat((cell.dataset.order ?? cell.dataset.sort ?? cell.textContent).replace('−', '-')))
      .map(number => Number.isFinite(number) ? number : null);
  },
};
